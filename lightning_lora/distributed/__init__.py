"""What each rank holds, and what ranks exchange.

Sharded parameters, averaged gradients, DeepSpeed's optimizer and the state of random generators. Nothing here knows
that adapters exist: functions take parameters and modules of any kind.
"""
