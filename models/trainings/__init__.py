"""One tiny training per attention architecture, on a task that asks for what it adds, beside a plain model trained the same way.

    python -m models.trainings run infini cope              train these (all without names), as far as results are missing
    python -m models.trainings page                          docs/attention-tasks.md, from the experiments and the stored results

`record` says what an experiment is, `experiments` lists them by subject, `runner` trains and measures, `page` writes the table.
"""
