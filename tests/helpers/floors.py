"""The floors of the package, on which its rooms stand."""

from __future__ import annotations

# From the ground up. A room imports from rooms of lower floors and from itself.
FLOORS = [
    {"version", "foreign", "patterns"},
    {"names", "arguments", "torch_internals"},
    {"config"},
    {"ops", "distributed", "files"},
    {"layers"},
    {"targets"},
    {"model"},
    {"methods", "peft_format"},
    {"analysis"},
    {"trainer"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
