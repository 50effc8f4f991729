# CoarseToFineAttention for images of 224 px: of 7 x 7 tiles of 2 x 2 patches, 16 are open.
coarse_attention = dict(type='adala_mm.CoarseToFineAttention', tile=2, block=4)
