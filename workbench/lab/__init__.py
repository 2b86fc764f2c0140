"""Working with models over time: corpora, tasks, training, runs, jobs, and the factors that a run stores."""
