"""What each rank holds, and what ranks exchange.

Functions take parameters and modules of any kind. No file of this room knows that adapters exist.
"""
