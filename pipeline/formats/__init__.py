"""The bytes of one thing: a tf.Example, a TFRecord file, a PNG, a page, a tar of images, and
the files of one projector.

Nothing here opens a file by its path.
"""
