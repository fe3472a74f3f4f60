"""A profile: what calibration found in one model.

schema.py     what ``profile.json`` holds, field by field
profile.py    the profile: its neurons, its dials and their reach, a steering as an edit of each neuron
dials.py      what a dial does on each text of the calibration, and as which temperature
store.py      the folder on disk, written whole or not at all, read no further than is sane
hub.py        a profile on a model hub, with a card
"""
