"""The application: multi-task GRPO that measures the tasks' gradients, with its tasks, evaluation and report."""
