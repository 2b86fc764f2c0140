"""Other libraries' models as subjects of the workbench's probes."""
