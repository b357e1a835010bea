"""Bars of progress."""

import io

from rich.console import Console

from flowformer.common.progress import progress_bar


def test_a_bar_counts_up_to_its_total():
    screen = io.StringIO()
    with progress_bar("counting", 1_000, Console(file=screen, force_terminal=True, width=100)) as advance:
        advance(400)
        advance(700)
    assert "counting" in screen.getvalue()
    assert "1000/1000" in screen.getvalue()


def test_without_a_console_nothing_is_shown(capsys):
    with progress_bar("counting", 3, None) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")
