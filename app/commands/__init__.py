"""One file per command of `workbench`; `app.cli` says what such a file defines."""
