#include "check.h"
void test_solver(){}
