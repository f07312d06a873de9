"""Token ids are those of a call of the tokenizer, whether Python or its backend is asked for them."""

import pytest

pytest.importorskip("transformers", reason="pip install 'fastlm[test]'")
from fastlm.integrations.encoding.tokens import Tokenizing, backend_of
from tests.encoding.support import texts, tokenizer


def shouting(**settings):
    """A tokenizer of a class that changes texts before they are tokenized, in transformers 4 and 5."""
    kind = type(tokenizer())

    def changed(self, *args, **kwargs):
        name = "text" if "text" in kwargs else "batch_text_or_text_pairs"
        given = [f"ab {each}" if isinstance(each, str) else (f"ab {each[0]}", each[1]) for each in kwargs[name]]
        return original(self, *args, **{**kwargs, name: given})

    hook = "_encode_plus" if "text" in kind._encode_plus.__code__.co_varnames[:3] else "_batch_encode_plus"
    original = getattr(kind, hook)
    found = tokenizer(**settings)
    found.__class__ = type("Shouting", (kind,), {hook: changed})
    return found


def padding():
    found = tokenizer()
    found.backend_tokenizer.enable_padding(length=64)
    return found


def changed():
    """Its backend is told of the change in its next call."""
    found = tokenizer()
    found.split_special_tokens = True
    return found


KINDS = {
    "usual": tokenizer,
    "without special tokens": lambda: tokenizer(special=False),
    "truncated at the left": lambda: tokenizer(truncation_side="left"),
    "with token types": lambda: tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
    "without token types": lambda: tokenizer(model_input_names=["input_ids", "attention_mask"]),
    "with padding": padding,
    "special tokens are text": lambda: tokenizer(split_special_tokens=True),
    "special tokens become text": changed,
    "of another class": shouting,
}
IN_PYTHON = ("special tokens become text", "of another class")


@pytest.mark.parametrize("query", [None, "ab ac"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_a_call(kind, query):
    found = [*texts(9, longest=15), "[SEP] ab [MASK]", "\u4e2d ab", *[""] * (kind != "without special tokens")]
    used, same = KINDS[kind](), KINDS[kind]()
    assert (backend_of(used) is None) == (kind in IN_PYTHON)
    for max_length in (200, 8):
        tokenizing = Tokenizing(used, found, max_length, query=query)
        items = tokenizing(range(len(found)))
        given = [[query] * len(found)] if query else []
        expected = same(*given, found, truncation=True, max_length=max_length, return_attention_mask=False)
        names = {name for name in expected if name in ("input_ids", "token_type_ids")}
        assert [item.features for item in items] == [
            {name: expected[name][k] for name in names} for k in range(len(found))
        ]
        lengths = [len(ids) for ids in same(*given, found)["input_ids"]]
        assert tokenizing.truncated == sum(length > max_length for length in lengths)


@pytest.mark.parametrize(
    "names, times", [(("_batch_encode_plus", "_encode_plus"), 1), (("_convert_encoding",), 2)], ids=str
)
def test_a_replaced_method_is_called(names, times):
    """Once for all texts, or once for each."""
    used, calls = tokenizer(), []
    name = next(name for name in names if hasattr(used, name))
    original = getattr(used, name)
    setattr(used, name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    assert [item.number for item in Tokenizing(used, ["ab", "ac"], 8)([0, 1])] == [0, 1]
    assert len(calls) == times
