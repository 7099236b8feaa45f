"""The verbs on any ``nn.Module``: apply, freeze, merge, unmerge, remove, save state, plan.

These functions walk a whole model and change it in place. They work without a Trainer and do not import Lightning.
"""
