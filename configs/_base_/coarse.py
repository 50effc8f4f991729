# CoarseToFineAttention for images of 512 px and more: of 8 x 8 tiles of 4 x 4 patches or more, 16 are open.
coarse_attention = dict(type='adala_mm.CoarseToFineAttention')
