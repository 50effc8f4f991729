# CoarseToFineAttention for images of 512 px and more: 16 tiles of 4 x 4 patches are open, of 8 x 8 tiles or more.
# num_open=24 is nearer to softmax, and faster than it at larger images only (docs/pick_attention.md).
coarse_attention = dict(type='adala_mm.CoarseToFineAttention')
