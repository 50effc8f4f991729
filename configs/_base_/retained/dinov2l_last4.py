# DINOv2-L whose last four blocks keep softmax attention, where the queries of an encoder-only mask head join.
last4 = [dict(type='adala_mm.SoftmaxAttention' if block >= 20 else 'adala_mm.LinearAttention') for block in range(24)]
