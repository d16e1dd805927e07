"""The kernels of the Triton backend, and the functions that they are made of. Imports Triton.

Functions take few arguments: what belongs together goes in a named tuple. One that holds constants is made in the call
that passes it on, where they stay constants; assigned to a variable, they would become values.
"""
