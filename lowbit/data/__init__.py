"""Images in, batches out.  NumPy and Pillow only; Keras and others are imported when asked for.

    preprocess   pixels -> what the network sees, one equation
    images       the type `Dataset`: labels, and a way to read image i
    folders      class folders, and images with a labels.csv (folder or .zip)
    arrays       .npz files, and scikit-learn's digits
    tfrecords    TF-slim's ImageNet layout
    downloads    keras.datasets and tensorflow-datasets
    datasets     `open_dataset(name_or_path, split)`: which of the above
    augment      random crops, shifts and mirrors, for training
    pipeline     batches in order, endless training batches, calibration batches

Imports point upwards in this list only.
"""
