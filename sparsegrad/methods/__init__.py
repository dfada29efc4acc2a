"""Fine-tuning methods, one file each, behind the protocol `Method` of `base.py`.

`full.py` is the shortest example. The fields of a method are the keys of its YAML in conf/method.
"""
