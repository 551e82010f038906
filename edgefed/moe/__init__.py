"""The model side: which experts a model has, which of them are on this device, and how they train.

`edgefed.moe.model.MoeModel` is the door; the other files are its parts.
"""
