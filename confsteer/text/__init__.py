"""Text: from files to windows of token ids.

sources.py      files, folders, datasets and the Python documentation to documents
windows.py      documents to windows of token ids, and which positions of a window count
images.py       conversations with images to what a model is given
several.py      several texts by name, each in windows of its own
counts.py       token counts of a corpus, counted or from a file
questions.py    multiple-choice questions from files and datasets
short_questions.py    questions with short answers, and the test whether an answer is right
question_shapes.py    shapes of the records of benchmarks
spelling.py     the text of each token, byte by byte
prompts.py      prompts made from questions
"""
