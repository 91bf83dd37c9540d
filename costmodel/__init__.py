from .laws import *
