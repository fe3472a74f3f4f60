"""Model and text, or weights on disk, to a profile.

calibrate.py    the paper's procedure, stage by stage
passes.py       passes over a recorded text, which go on where an interrupted run stopped
scan.py         what the weights alone say, read off the disk
"""
