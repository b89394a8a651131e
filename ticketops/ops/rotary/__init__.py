"""Rotary positions, in place: turns pairs of channels of the queries and keys by angles that grow with the position.

With the halves (a, b) of a head and the cosines and sines (c, s) of its token, turned = (a c_a - b s_a, b c_b + a s_b).
The gradient is turned by the transpose, (a c_a + b s_b, b c_b - a s_a). The backends are parts of ops.layer; each has
`turn_(qkv, cosines, sines, back)`.
"""
