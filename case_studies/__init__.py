"""Published analyses, one folder each."""
