# What recipes named plus have in common; docs/beyond.md says why, docs/results.md what it brings.
plus_attention = dict(type='adala_mm.HedgehogAttention', variant='exp', dwconv=3)
