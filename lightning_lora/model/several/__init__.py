"""Several adapters on one model: which of them act, one that goes while the others stay."""
