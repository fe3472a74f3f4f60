"""A page to feel the dials: one prompt, neutral and steered, token by token. It speaks what OpenAI-compatible servers speak.

page.py           the page, in one file that needs nothing but the server it is from
description.py    what a server says it can steer, for the page and for clients
"""
