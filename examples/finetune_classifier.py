"""Fine-tunes an accelerated MiniLM checkpoint as a sentence classifier with transformers' Trainer.

    python examples/finetune_classifier.py path/to/minilm [--steps 60]

The classes are sentences about the weather and about food, a task that is learned in a few steps.
"""

import argparse
import itertools
import tempfile

import transformers

import fastlm

WEATHER = (
    "It will {} {}.",
    ("rain", "snow", "be sunny", "be windy", "hail", "be foggy"),
    ("today", "tomorrow", "in the north", "all week", "before dawn", "again"),
)
FOOD = (
    "She {} the {}.",
    ("cooked", "ate", "ordered", "tasted", "burned", "served"),
    ("soup", "rice", "noodles", "pancakes", "stew", "salad"),
)


def examples(tokenizer):
    """(evaluation set, training set)."""
    rows = []
    for label, (pattern, first, second) in enumerate((WEATHER, FOOD)):
        for words in itertools.product(first, second):
            rows.append({**tokenizer(pattern.format(*words)), "labels": label})
    return rows[::3], [row for i, row in enumerate(rows) if i % 3]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("checkpoint")
    arguments.add_argument("--steps", type=int, default=60)
    arguments = arguments.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(arguments.checkpoint, num_labels=2)
    fastlm.accelerate(model)
    print(fastlm.report(model))

    held_out, data = examples(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=8,
                learning_rate=5e-5,
                logging_steps=20,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=data,
            eval_dataset=held_out,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        trainer.train()
        print(f"accuracy on {len(held_out)} evaluation sentences: {trainer.evaluate()['eval_accuracy']:.2f}")


if __name__ == "__main__":
    main()
