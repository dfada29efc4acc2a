"""The paper's tables and figures: the runs and measurements that they need, and the report that shows them."""
