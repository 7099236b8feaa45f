"""The merge of adapters on a quantized base, whose few bits cannot hold the sum.

The layers become plain linear layers: their weights are the sum of the adapters and of the dequantized weights, or
of the weights in full precision that a file holds. What a layer was before stays in its record, for the way back.
"""
