"""Regular expressions on names, from the user and from strangers' files. The standard library's parser reads them.

A match takes a time that is bounded by the lengths of expression and name, whatever the two are. This room knows
strings only.
"""
