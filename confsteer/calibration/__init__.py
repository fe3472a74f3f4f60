"""Calibration: from a model and a text, or from weights on disk, to a profile.

calibrate.py    the paper's procedure, stage by stage
stages.py       the measurements of each stage
passes.py       passes over a recorded text
progress.py     the file from which an interrupted calibration goes on
assemble.py     the profile, made from the stages' measurements
scan.py         statistics of the weights alone, read from disk
published.py    neurons that others have published, and their agreement with a scan
"""
