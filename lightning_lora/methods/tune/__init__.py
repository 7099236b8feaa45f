"""Training parameters of the base itself, and nothing else: biases, norms, the head, all, or what patterns name.

Nothing is added, so nothing merges: after a run the module holds the trained values. What was there before is in the
records, and ``remove_adapted`` brings it back.
"""
