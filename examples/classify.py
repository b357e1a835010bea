"""Classify real series with the estimator: BasicMotions, from aeon's wheel (four activities, a watch's sensors).

Run: python examples/classify.py
"""

from aeon.datasets import load_basic_motions

from flowformer import FlowformerClassifier

if __name__ == "__main__":
    train, train_labels = load_basic_motions(split="train")
    test, test_labels = load_basic_motions(split="test")
    classifier = FlowformerClassifier(n_epochs=10, dim=64, num_heads=4, ffn_dim=128, random_state=0)
    classifier.fit(train, train_labels)
    print(f"BasicMotions, 10 epochs of a small model: test accuracy {classifier.score(test, test_labels):.3f}")
