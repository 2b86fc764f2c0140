"""What a person starts: the command line (`app.cli`) and the web dashboard (`app.dashboard`)."""
