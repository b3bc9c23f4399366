"""The fast path of `StructuredViews`: supported operations in few passes over the pixels of all views.

geometry   crops, resizes and flips as one resampling of each image
segments   which operations are supported, and how neighboring ones are combined
blur       Gaussian blurs, as one weighted sum along each axis
work       all views of a batch

The operation-by-operation path is the reference: the parameters are the same, and pixels agree within the bounds given
in docs/views.md.
"""
