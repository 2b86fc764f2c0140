"""The catalogue's entries for the case studies, read from their claims. Importing this module declares them."""

from case_studies.harness.claims import read_study
from case_studies.harness.discovery import study_folders
from workbench.lab.catalogue import implements

for folder in study_folders():
    study = read_study(folder)
    for slug in study.papers:
        implements(slug, "case_study", study.name)
