"""The verbs on any ``nn.Module``: apply, freeze, merge, unmerge, remove, save state, plan.

A verb changes all of a model in place, or nothing; the other files describe a model: its state, its fingerprint, its
summary. Nothing here needs a Trainer or imports Lightning.
"""
