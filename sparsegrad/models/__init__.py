"""The model and tokenizer of a run: their source, loading them, and what of the model is trained.

`source.py` finds the files, `loading.py` loads them, and `layer_choice.py` chooses the blocks that train.
"""
