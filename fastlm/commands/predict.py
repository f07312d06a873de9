"""fastlm predict: the most likely next tokens, or fillings of [MASK], as a table."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from fastlm.commands.display import console
from fastlm.commands.process import set_up
from fastlm.generation import load_tokenizer
from fastlm.generation.predict import predict
from fastlm.models import load_model


def run(directory: Path, text: str, *, top: int, temperature: float, device: str, threads: int | None) -> None:
    chosen = set_up(device, threads)
    candidates = predict(load_model(directory).to(chosen), load_tokenizer(directory), text, top, temperature)
    several_masks = any(c.place for c in candidates)
    table = Table()
    if several_masks:
        table.add_column("[MASK]".replace("[", r"\["), justify="right")
    table.add_column("token")
    table.add_column("score", justify="right")
    table.add_column(f"probability at temperature {temperature:g}", justify="right")
    table.add_column("")
    for i, c in enumerate(candidates):
        last = i + 1 < len(candidates) and candidates[i + 1].place != c.place
        place = [str(c.place + 1)] if several_masks else []
        bar = "█" * round(20 * c.probability)
        table.add_row(
            *place, Text(repr(c.token)), f"{c.score:.3f}", f"{100 * c.probability:.2f} %", bar, end_section=last
        )
    console.print(table)
