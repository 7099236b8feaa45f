"""What each Lightning strategy needs from an adapted run.

One class for each family of strategies, with hooks that a run calls in a fixed order.
"""
