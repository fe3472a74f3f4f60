"""A profile: the results of calibrating one model.

schema.py     the fields of ``profile.json``
profile.py    the profile: its neurons, its dials and their reach, a steering as an edit of each neuron
dials.py      the effect of a dial on each text of the calibration, and the temperature that equals it
store.py      the folder on disk, written whole or not at all, and read with a limit
hub.py        a profile on a model hub, with a card
"""
