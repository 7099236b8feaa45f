"""The verbs on any ``nn.Module``: apply, freeze, merge, unmerge, remove, save state, plan.

These functions change a whole model in place, all of it or nothing. They need no Trainer and do not import Lightning.
"""
