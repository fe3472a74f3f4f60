"""Model and text, or weights on disk, to a profile.

calibrate.py    the paper's procedure, stage by stage
stages.py       what each stage measures
passes.py       passes over a recorded text
progress.py     the file that an interrupted calibration goes on from
assemble.py     what the stages measured, as a profile
scan.py         what the weights alone say, read off the disk
published.py    neurons that others have published, and how far a scan agrees
"""
