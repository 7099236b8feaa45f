"""Training in a random subspace: ``theta = theta_0 + P z`` with z of a few hundred numbers for the whole model.

P is random, fixed, and a function of a seed, so a file holds z alone. Every floating parameter of the base is read as
the sum; the base itself stays frozen.
"""
