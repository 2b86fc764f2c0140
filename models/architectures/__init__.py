"""The architectures: each a name, a paper and a configuration of shared parts, in one file per family.

A new one is a new file here that registers itself (`models.architectures.shared.language_model` does it for compositions of the shared
parts); it is found by being there.
"""
