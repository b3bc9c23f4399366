"""The fast path of `StructuredViews`: known operations as few passes over the pixels of all views.

geometry   crops, resizes and flips as one resampling of each image
chain      operations on colors as a table of instructions, run in place
blur       Gaussian blurs, one weighted sum along each axis
work       which steps are known, and all views of a batch

The operation-by-operation path stays the definition: same parameters, equal pixels within the bounds of docs/views.md.
"""
