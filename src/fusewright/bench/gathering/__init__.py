"""The same rows elsewhere: published hashes of a suite's data, and how its folder is made again.

A *manifest* (``manifest``) says where each data set came from and which rows were taken: hashes of
the pictures, and their labels; pictures are no part of it. ``pictures`` reads public copies in the
forms in which they are found, ``gather`` picks the rows out of them (``picks``) and writes the
folder that the suite reads (``writing``), ``check`` says whether a folder holds exactly these rows.
"""
