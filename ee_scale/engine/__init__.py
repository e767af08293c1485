"""DeepSpeed's pipeline engine with schedules that make a frozen backbone cheap. The only place that knows its insides."""
