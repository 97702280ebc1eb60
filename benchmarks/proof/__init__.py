"""How many wrong kernels does each way of checking find?"""
