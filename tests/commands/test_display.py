import io

from rich.console import Console

from fastlm.commands import display


def test_the_bar_of_bytes_is_shown_in_a_terminal_only(monkeypatch):
    for is_terminal in (True, False):
        output = io.StringIO()
        monkeypatch.setattr(display, "console", Console(file=output, force_terminal=is_terminal, width=100))
        with display.byte_bar() as show:
            for stage in ("reading", "tokenizing"):
                for done in range(5):
                    show(stage, done * 10**6, 5 * 10**6)
        shown = output.getvalue()
        assert all(word in shown for word in ("reading", "tokenizing", "MB")) == is_terminal
        assert is_terminal or not shown
