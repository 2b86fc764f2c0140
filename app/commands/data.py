"""`workbench data`: the corpora and tasks, and which of them can be read here."""

from __future__ import annotations

from app.commands._console import add_row, new_table, note, print_json, stdout
from app.commands._options import AsJson

PANEL = "What is here"


def command(as_json: AsJson = False) -> None:
    """Corpora and tasks to train and measure a model on."""
    from workbench.lab.corpora import list_corpora
    from workbench.lab.tasks import list_tasks

    corpora, tasks = list_corpora(), list_tasks()
    if as_json:
        print_json({"corpora": corpora, "tasks": tasks})
        return
    table = new_table("corpus", "here", "licence", "description", wide=("licence", "description"))
    for corpus in corpora:
        add_row(table, corpus.name, "yes" if corpus.available else "no", corpus.licence, corpus.description)
    stdout().print(table)
    for corpus in corpora:
        if not corpus.available:
            note(f"{corpus.name}: {corpus.reason}")
    table = new_table("task", "settings", "description", wide=("settings", "description"))
    for task in tasks:
        settings = " ".join(name if value is None else f"{name}={value}" for name, value in task.options.items())
        add_row(table, task.name, settings, task.description)
    stdout().print(table)
